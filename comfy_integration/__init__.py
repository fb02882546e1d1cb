"""The ComfyUI integration: nodes, and the hook that compiles a model; imported as
onlinequant_backend.comfy_integration. ``nodes`` and ``widgets`` define the user interface; only ComfyUI can import
them. ``model_patch`` and ``control_patch`` run a model's denoiser or a ControlNet through the backend while it samples,
and ``residency`` makes quantized models work with ComfyUI's memory management. ``record`` collects measurements and
reports, which ``summary`` and ``status`` show.
"""
