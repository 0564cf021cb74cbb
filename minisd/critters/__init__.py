"""Critters: procedural cats and dogs that know their own captions, depth, normals, parts and edges."""

from .captions import caption, prompt
from .fuse import compile
from .material import PARTS
from .render import Render, batches, depths, render
from .scene import WORDS, Scene

__all__ = ["PARTS", "WORDS", "Render", "Scene", "batches", "caption", "compile", "depths", "prompt", "render"]
