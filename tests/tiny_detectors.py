"""Detectors with the true inputs and outputs and random weights: `python tiny_detectors.py MODELS`, in ComfyUI's environment

The networks' answers tremble with every pixel of their input, around a person who stands in the middle: so what comes
out of them can be checked."""
import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VideoModel, Sam2VisionConfig

BOX = (220, 60, 420, 620) # left, top, right, bottom in the 640x640 the detector sees

def write(path: Path, nodes: list, given: tuple, made: tuple, constants: dict[str, np.ndarray]) -> None:
    graph = helper.make_graph(nodes, path.stem, [helper.make_tensor_value_info(given[0], TensorProto.FLOAT, given[1])],
                              [helper.make_tensor_value_info(made[0], TensorProto.FLOAT, made[1])], [numpy_helper.from_array(v, k) for k, v in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)

def person_detector(path: Path, rng: np.random.Generator) -> None:
    "(1, 3, 640, 640) -> (1, 300, 6): a person, a chair, a person too unsure, and nothing"
    rows = np.zeros((1, 300, 6), np.float32)
    rows[0, 0], rows[0, 1], rows[0, 2] = (*BOX, 0.9, 0), (20, 300, 120, 600, 0.8, 56), (0, 0, 640, 640, 0.01, 0)
    free = np.zeros((1, 300, 6), np.float32)
    free[0, 0, :4] = 1 # only the person's box depends on the picture
    nodes = [helper.make_node('Conv', ['images', 'w'], ['c'], strides=[32, 32]), helper.make_node('Reshape', ['c', 'shape'], ['r']), helper.make_node('Transpose', ['r'], ['t'], perm=[0, 2, 1]),
             helper.make_node('Slice', ['t', 'from', 'to', 'axis'], ['s']), helper.make_node('Mul', ['s', 'free'], ['m']), helper.make_node('Add', ['m', 'rows'], ['output0'])]
    write(path, nodes, ('images', [1, 3, 640, 640]), ('output0', [1, 300, 6]), {
        'w': rng.normal(0, .02, (6, 3, 32, 32)).astype(np.float32), 'shape': np.array([1, 6, 400]), 'from': np.array([0]), 'to': np.array([300]), 'axis': np.array([1]), 'free': free, 'rows': rows})

def keypoint_detector(path: Path, rng: np.random.Generator) -> None:
    "(1, 3, 256, 192) -> (1, 133, 64, 48): a bump for each keypoint, on a grid"
    y, x = np.mgrid[:64, :48]
    bumps = np.stack([.9 * np.exp(-((x - (8 + 32 * (k % 12) / 11))**2 + (y - (6 + 52 * (k // 12) / 11))**2) / 8) for k in range(133)])[None].astype(np.float32)
    nodes = [helper.make_node('Conv', ['input', 'w'], ['c'], strides=[4, 4]), helper.make_node('Add', ['c', 'bumps'], ['output'])]
    write(path, nodes, ('input', [1, 3, 256, 192]), ('output', [1, 133, 64, 48]), {'w': rng.normal(0, 1e-4, (133, 3, 4, 4)).astype(np.float32), 'bumps': bumps})

def mask_model() -> Sam2VideoModel:
    "SAM2 with its true pictures, prompts, memory and masks, and few layers: a frame takes 1 s on a CPU instead of 10"
    widths = [32, 64, 128, 256]
    backbone = Sam2HieraDetConfig(hidden_size=32, blocks_per_stage=[1, 1, 1, 1], embed_dim_per_stage=widths, num_attention_heads_per_stage=[1, 2, 4, 8], global_attention_blocks=[])
    return Sam2VideoModel(Sam2VideoConfig(vision_config=Sam2VisionConfig(backbone_config=backbone, backbone_channel_list=widths[::-1]), memory_attention_num_layers=1))

if __name__ == '__main__':
    models, numbers = Path(sys.argv[1]), np.random.default_rng(0)
    torch.manual_seed(0)
    person_detector(models / 'detection/yolox_l.onnx', numbers)
    keypoint_detector(models / 'detection/vitpose-l-wholebody.onnx', numbers)
    mask_model().save_pretrained(models / 'sam2')
