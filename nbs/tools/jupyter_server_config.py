"""What `make lab` sets: notebooks are saved as the repository keeps them, without run counts and the name of one's own
kernel; and in a container or a pod, where one is root, it starts all the same"""
import os

from nbdev.clean import clean_jupyter

c.ContentsManager.pre_save_hook = clean_jupyter # noqa: F821 jupyter gives `c`
c.ServerApp.allow_root = os.geteuid() == 0 # noqa: F821
