"""Pictures of simple scenes, the text that describes them, and a small diffusion model that was trained to draw them.

It ships with the package, so that what 8 bit does to whole pictures can be seen and measured with no download.
"""
