"""Nodes that the tests put into ComfyUI: to see what flows along a link, and to make what no real node makes"""
import json
import os
from pathlib import Path

import av
import folder_paths
import numpy as np
import torch
from comfy import ops
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from nodes import common_ksampler
from PIL import Image


class Any(str):
    "A type that takes every link"
    def __ne__(self, other): return False

def opened(value):
    "What CLIP vision gives is an object; its tensors are its attributes"
    return vars(value) if type(value).__name__ == 'Output' else value

def described(value):
    "Shapes of all tensors in whatever a link carries"
    value = opened(value)
    if isinstance(value, torch.Tensor): return list(value.shape)
    if isinstance(value, dict): return {k: described(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return [described(v) for v in value]
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__

def tensors(value, name: str = 'value') -> dict:
    "All tensors, by their way there"
    value = opened(value)
    if isinstance(value, torch.Tensor): return {name: value.float().cpu().numpy()}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: v for key, inner in pairs for k, v in tensors(inner, f'{name}.{key}').items()}

class Probe:
    "Shapes of a link's value into NAME.json, its tensors into NAME.npz"
    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = 'tests', 'run', True, ()

    @classmethod
    def INPUT_TYPES(cls): return {'required': {'value': (Any('*'),), 'name': ('STRING', {})}}

    def run(self, value, name):
        folder = Path(folder_paths.get_output_directory()) / 'probes'
        folder.mkdir(exist_ok=True)
        np.savez(folder / f'{name}.npz', **tensors(value))
        (folder / f'{name}.json').write_text(json.dumps(described(value)))
        return {}

class NumberedMask:
    "A mask whose frame i is filled with 100 + i: rows can be told apart"
    CATEGORY, FUNCTION, RETURN_TYPES = 'tests', 'run', ('MASK',)

    @classmethod
    def INPUT_TYPES(cls):
        side = 'INT', {'min': 8, 'max': 4096}
        return {'required': {'length': ('INT', {'min': 1, 'max': 1024}), 'width': side, 'height': side}}

    def run(self, length, width, height):
        numbers = torch.arange(100, 100 + length, dtype=torch.float32)
        return (numbers[:, None, None].expand(length, height, width).contiguous(),)

class FullMemory:
    "Passes images on; runs out of memory when there are more than `most`"
    CATEGORY, FUNCTION, RETURN_TYPES = 'tests', 'run', ('IMAGE',)

    @classmethod
    def INPUT_TYPES(cls): return {'required': {'images': ('IMAGE',), 'most': ('INT', {'min': 0, 'max': 1024})}}

    def run(self, images, most):
        if len(images) > most: raise torch.OutOfMemoryError('Allocation on device')
        return (images,)

class SayPrompt:
    "Stands in for umT5: numbers that depend on the text, in its shape"
    CATEGORY, FUNCTION, RETURN_TYPES = 'tests', 'run', ('CONDITIONING',)

    @classmethod
    def INPUT_TYPES(cls): return {'required': {'text': ('STRING', {}), 'encoder': ('STRING', {})}}

    def run(self, text, encoder): return ([[torch.full((1, 512, 4096), len(text) / 100), {}]],)

class Fp8Layer:
    "A layer of fp8 weights, inside a forward pass of the model and then outside: products in fp8, and their error"
    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = 'tests', 'run', True, ()

    @classmethod
    def INPUT_TYPES(cls): return {'required': {'model': ('MODEL',), 'kernels': ('AVATAR_KERNELS',)}}

    def run(self, model, kernels):
        linear = ops.scaled_fp8_ops(fp8_matrix_mult=True, scale_input=True).Linear
        layer = linear(32, 16, bias=False, dtype=torch.float8_e4m3fn).eval()
        layer.reset_parameters()
        numbers = torch.Generator().manual_seed(0)
        layer.weight.data = torch.randn(16, 32, generator=numbers).to(torch.float8_e4m3fn)
        given = torch.randn(1, 4, 32, generator=numbers, dtype=torch.bfloat16)
        kernels.ran.clear()
        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, model.model_options, is_model_options=True)
        out = WrapperExecutor.new_class_executor(lambda x: layer(x), model.model, wrappers).execute(given.clone())
        off = out.float() - given.float() @ layer.weight.float().T
        inside = dict(kernels.ran)
        kernels.ran.clear()
        layer(given.clone())
        said = {'inside': inside, 'outside': dict(kernels.ran), 'off': float(off.abs().max())}
        return {'ui': {'said': [said]}}

class MotionCalls:
    "Sample with and without the hooks of AvatarKernels: calls of the encoder of close-ups, are results equal"
    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = 'tests', 'run', True, ()

    @classmethod
    def INPUT_TYPES(cls):
        links = {'hooked': ('MODEL',), 'plain': ('MODEL',), 'positive': ('CONDITIONING',),
                 'negative': ('CONDITIONING',), 'latent': ('LATENT',)}
        return {'required': links | {'steps': ('INT', {}), 'cfg': ('FLOAT', {})}}

    def run(self, hooked, plain, positive, negative, latent, steps, cfg):
        encoder = plain.model.diffusion_model.motion_encoder
        real, calls, made, known = encoder.get_motion, [], [], {}
        def counted(faces): # ten seconds of a CPU for the same faces each time: they are encoded once, and counted
            calls[-1] += 1
            key = faces.contiguous().view(torch.uint8).numpy().tobytes()
            if key not in known: known[key] = real(faces)
            return known[key].clone()
        encoder.get_motion = counted
        try:
            for model in (hooked, plain):
                calls.append(0)
                out, = common_ksampler(model, 1, steps, cfg, 'euler', 'simple', positive, negative, latent)
                made.append(out['samples'])
        finally: del encoder.get_motion
        left = 'after_patch_embedding' in vars(plain.model.diffusion_model)
        return {'ui': {'said': [{'calls': calls, 'equal': bool(torch.equal(*made)), 'left': left}]}}

class FullDisk:
    "Writes to a device that is always full, through one of several libraries"
    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = 'tests', 'run', True, ()
    WRITERS = {'python': lambda f: f.write(b'x' * 10**6),
               'numpy': lambda f: np.zeros(10**5).tofile(f),
               'numpy archive': lambda f: np.savez(f, a=np.zeros(10**5)),
               'torch': lambda f: torch.save(torch.zeros(10**5), f),
               'pillow': lambda f: Image.effect_noise((300, 300), 50).save(f, 'PNG'),
               'pyav': lambda f: record('/dev/full')}

    @classmethod
    def INPUT_TYPES(cls): return {'required': {'writer': (list(cls.WRITERS),)}}

    def run(self, writer):
        with open('/dev/full', 'wb') as f: self.WRITERS[writer](f)
        return {}

def record(path):
    "A video of noise"
    with av.open(path, 'w', format='mpegts') as out:
        stream = out.add_stream('mpeg4', rate=24, width=320, height=240, bit_rate=10**8)
        noise = np.random.default_rng(0)
        for _ in range(24):
            frame = noise.integers(0, 255, (240, 320, 3), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        out.mux(stream.encode())

class Variables:
    "The environment that ComfyUI has"
    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = 'tests', 'run', True, ()

    @classmethod
    def INPUT_TYPES(cls): return {'required': {}}

    def run(self): return {'ui': {'variables': [f'{k}={v}' for k, v in os.environ.items()]}}

NODES = Probe, NumberedMask, FullMemory, SayPrompt, FullDisk, Variables, Fp8Layer, MotionCalls
NODE_CLASS_MAPPINGS = {c.__name__: c for c in NODES}
