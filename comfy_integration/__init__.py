"""ComfyUI's side: the nodes and the hook that compiles a model; import it as onlinequant_backend.comfy_integration.

``nodes`` and ``widgets`` are what ComfyUI shows; only ComfyUI can import them. ``model_patch`` and ``control_patch``
have the backend run a model's denoiser or a ControlNet while it samples, and ``residency`` keeps ComfyUI's memory
management and models in 8 bit from working against each other. ``record`` collects what was seen, for ``summary`` and
``status`` to show.
"""
