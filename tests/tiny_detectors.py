"""Detectors with true inputs and outputs and random weights: `python tiny_detectors.py MODELS` in ComfyUI's environment

The networks' answers tremble with every pixel of their input, around a person who stands in the middle: so their
results can be checked."""
import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VideoModel, Sam2VisionConfig

BOX = (440, 67.5, 840, 697.5) # left, top, right, bottom of the person in a frame of 1280x720
SEEN = 0.5 # YOLOX sees such a frame at half its size, in the upper left corner of 640x640

def write(path: Path, nodes: list, given: tuple, made: tuple, constants: dict[str, np.ndarray]) -> None:
    source = helper.make_tensor_value_info(given[0], TensorProto.FLOAT, given[1])
    result = helper.make_tensor_value_info(made[0], TensorProto.FLOAT, made[1])
    values = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, path.stem, [source], [result], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)

def candidate(box: tuple, stride: int, column: int, row: int) -> list[float]:
    "A box of the 640x640 as YOLOX says it from a cell of one of its three grids"
    (left, top, right, bottom) = box
    middle = [(left + right) / 2 / stride - column, (top + bottom) / 2 / stride - row]
    return middle + [np.log((right - left) / stride), np.log((bottom - top) / stride)]

def person_detector(path: Path, rng: np.random.Generator) -> None:
    "(1, 3, 640, 640) -> (1, 8400, 85): a person whom two cells find, a chair before them, an unsure person, nothing"
    rows = np.zeros((1, 8400, 85), np.float32)
    free = np.zeros((1, 8400, 1), np.float32)
    person = 5
    chair = 5 + 56
    seen = np.array(BOX) * SEEN
    sure = 20 * 80 + 40
    cells = {
        sure: (seen, 8, 40, 20, person, .9),
        6400 + 11 * 40 + 20: (seen + 4, 16, 20, 11, person, .8),
        21 * 80 + 40: (seen, 8, 40, 21, chair, .95),
        8000: ((0, 0, 640, 360), 32, 0, 0, person, .2),
    }
    for k, (box, stride, column, row, kind, score) in cells.items():
        rows[0, k, :4] = candidate(box, stride, column, row)
        rows[0, k, 4] = 1
        rows[0, k, kind] = score
    free[0, sure] = 1 # only the surer of the person's two boxes depends on the picture
    nodes = [
        helper.make_node('Conv', ['images', 'w'], ['c'], strides=[32, 32]),
        helper.make_node('GlobalAveragePool', ['c'], ['mean']),
        helper.make_node('Reshape', ['mean', 'shape'], ['r']),
        helper.make_node('Mul', ['r', 'free'], ['m']),
        helper.make_node('Add', ['m', 'rows'], ['output']),
    ]
    weights = np.zeros((85, 3, 32, 32), np.float32)
    weights[:4] = rng.normal(0, 1e-6, (4, 3, 32, 32)) # pixels are 0 to 255 and all of one sign
    constants = {'w': weights, 'shape': np.array([1, 1, 85]), 'free': free, 'rows': rows}
    write(path, nodes, ('images', [1, 3, 640, 640]), ('output', [1, 8400, 85]), constants)

def keypoint_detector(path: Path, rng: np.random.Generator) -> None:
    "(1, 3, 256, 192) -> (1, 133, 64, 48): a bump for each keypoint, on a grid"
    y, x = np.mgrid[:64, :48]
    def bump(k): return .9 * np.exp(-((x - (8 + 32 * (k % 12) / 11))**2 + (y - (6 + 52 * (k // 12) / 11))**2) / 8)
    bumps = np.stack([bump(k) for k in range(133)])[None].astype(np.float32)
    nodes = [
        helper.make_node('Conv', ['input', 'w'], ['c'], strides=[4, 4]),
        helper.make_node('Add', ['c', 'bumps'], ['output']),
    ]
    constants = {'w': rng.normal(0, 1e-4, (133, 3, 4, 4)).astype(np.float32), 'bumps': bumps}
    write(path, nodes, ('input', [1, 3, 256, 192]), ('output', [1, 133, 64, 48]), constants)

def mask_model(blind: bool = False) -> Sam2VideoModel: # blind: one that sees nobody
    """SAM2 with its true pictures, prompts, memory and masks, and few layers: a frame takes 1 s on a CPU instead of 10

    Its mask is an upright stripe where the person stands, with a trembling rim."""
    widths = [32, 64, 128, 256]
    backbone = Sam2HieraDetConfig(
        hidden_size=32,
        blocks_per_stage=[1, 1, 1, 1],
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[1, 2, 4, 8],
        global_attention_blocks=[],
    )
    vision = Sam2VisionConfig(backbone_config=backbone, backbone_channel_list=widths[::-1])
    model = Sam2VideoModel(Sam2VideoConfig(vision_config=vision, memory_attention_num_layers=1))
    decoder = model.mask_decoder
    encoder = model.vision_encoder
    with torch.no_grad():
        encoder.backbone.pos_embed[:, 0] = torch.tensor([-8, -8, 1, 8, 1, -8, -8.]) # across: 0 at each third
        finest = encoder.neck.convs[-1].weight
        skip = decoder.conv_s0.weight
        finest[0] = 0 # this channel goes straight to the mask, once as it is, once negated
        skip[:2] = 0
        finest[0, 0] = 1
        skip[0, 0] = 1
        skip[1, 0] = -1
        decoder.pred_obj_score_head.proj_out.bias.fill_(-10 if blind else 10) # nobody, or somebody, is always there
        for layers in decoder.output_hypernetworks_mlps:
            layers.proj_out.weight.mul_(.01)
            layers.proj_out.bias[:2] = torch.tensor([1, -1.])
    return model

if __name__ == '__main__':
    models = Path(sys.argv[1])
    numbers = np.random.default_rng(0)
    torch.manual_seed(0)
    person_detector(models / 'detection/yolox_l.onnx', numbers)
    keypoint_detector(models / 'detection/vitpose-l-wholebody.onnx', numbers)
    mask_model().save_pretrained(models / 'sam2')
    mask_model(blind=True).save_pretrained(models / 'sam2/blind')
