"""The 20 single-image networks of Taskonomy (Zamir et al., 2018), which are not part of the book, and their ranking.

For a person who has the networks: names, and which sources measured transfer found best for each target. The lists are
those that the authors of :mod:`dfkd_lib.methods.attribution` compare with.
"""

from __future__ import annotations

_BEST = """
autoencoder: denoise, inpainting, colorization, segment2d, keypoint2d
denoise: inpainting, autoencoder, colorization, segment2d, keypoint2d
edge2d: keypoint2d, autoencoder, segment2d, denoise, colorization
keypoint2d: denoise, autoencoder, colorization, segment2d, inpainting
segment2d: autoencoder, keypoint2d, denoise, colorization, edge2d
curvature: sfnorm, depth, keypoint3d, mist, reshade
edge3d: sfnorm, keypoint3d, depth, curvature, mist
keypoint3d: curvature, sfnorm, segment25d, edge3d, reshade
reshade: sfnorm, mist, depth, edge3d, keypoint3d
depth: mist, reshade, keypoint3d, sfnorm, edge3d
mist: depth, reshade, edge3d, keypoint3d, sfnorm
sfnorm: reshade, edge3d, keypoint3d, curvature, segment25d
room_layout: sfnorm, vanishing_point, reshade, edge3d, mist
segment25d: keypoint3d, sfnorm, curvature, edge3d, reshade
vanishing_point: sfnorm, room_layout, reshade, edge3d, segment25d
segmentsemantic: curvature, sfnorm, keypoint3d, reshade, class_places
class_1000: class_places, segmentsemantic, edge3d, curvature, keypoint3d
class_places: class_1000, segmentsemantic, edge3d, curvature, keypoint3d
"""

# {target: its five best sources, best first}. Colorization and inpainting are sources alone.
BEST_SOURCES: dict[str, tuple[str, ...]] = {
    target: tuple(sources.split(", ")) for target, sources in (line.split(": ") for line in _BEST.strip().splitlines())
}
TASKS = (*BEST_SOURCES, "colorization", "inpainting")
