"""ComfyUI's side: the nodes and the hook that compiles a model; import it as onlinequant_backend.comfy_integration."""
