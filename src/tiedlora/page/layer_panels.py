"""The profiles of layers as a file: norms of u_l and v_l, norms of the updates, and their cosine with LoRA's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from tiedlora.analysis.adapters import LayerProfile, LayerProfiles
from tiedlora.page.panels import INK, style

REFERENCE = "#6f6f6f"


def titled(profiles: LayerProfiles) -> list[tuple[str, list[LayerProfile]]]:
    """The panels that have something to show, with their titles."""
    panels = [
        (r"norm of u by layer / root of r", profiles.u),
        (r"norm of v by layer / root of d", profiles.v),
        ("norm of the update by layer", profiles.updates),
        (f"cosine of the update with that of {profiles.compared_with}", profiles.cosines),
    ]
    return [(title, own) for title, own in panels if own]


def layer_panel(ax: Axes, title: str, profiles: Sequence[LayerProfile]) -> None:
    """Draw the profiles: the mean over seeds, and the band from the lowest to the highest seed."""
    for profile in profiles:
        colour, marker, dash = (REFERENCE, "", ":") if profile.is_reference else style(profile.group)
        values = profile.values
        ax.plot(
            *(profile.layers, values.mean(0)),
            color=colour,
            linestyle=dash,
            linewidth=1.3,
            marker=marker or None,
            markersize=3.5,
            label=profile.name,
        )
        if len(values) > 1:
            ax.fill_between(profile.layers, np.min(values, 0), np.max(values, 0), color=colour, alpha=0.15, linewidth=0)
    ax.set_title(title, fontsize=9, color=INK)
    ax.set_xlabel("layer")
    ax.legend(fontsize=7.5)
