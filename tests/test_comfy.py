"""ComfyUI as our child: what it is told, what it says back"""
import asyncio
import uuid
from pathlib import Path

from conftest import comfy_dir

from wan_avatar.comfy import ComfyPlace, run, running_comfy

PICTURE = {'a': {'class_type': 'EmptyImage', 'inputs': {'width': 64, 'height': 64, 'batch_size': 1, 'color': 255}},
           'b': {'class_type': 'PreviewImage', 'inputs': {'images': ['a', 0]}}}

async def history_of_one_prompt(work: Path) -> dict:
    async with running_comfy(ComfyPlace(comfy_dir(), work, work / 'models')) as comfy:
        await run(comfy, PICTURE)
        return await comfy._get('/history')

def test_prompt_ids_are_uuids_with_hyphens(tmp_path):
    "Newer ComfyUIs refuse every other form"
    said = asyncio.run(history_of_one_prompt(tmp_path))
    assert len(said) == 1 and all(str(uuid.UUID(prompt_id)) == prompt_id for prompt_id in said)
