"JupyterLab saves notebooks as the repository keeps them: without run counts and the name of one's own kernel"
from nbdev.clean import clean_jupyter

c.ContentsManager.pre_save_hook = clean_jupyter # noqa: F821 jupyter gives `c`
