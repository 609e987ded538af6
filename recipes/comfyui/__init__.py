"""Fluvial's nodes for ComfyUI. Copy this folder into ComfyUI's `custom_nodes`, as `custom_nodes/fluvial_nodes`."""

from fluvial.interop.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
