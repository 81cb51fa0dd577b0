"""RunPod's Hub looks for a handler.py; the worker of the image is a module"""
import runpy

runpy.run_module('wan_avatar.worker', run_name='__main__')
