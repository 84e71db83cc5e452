"""Points: where an activation is seen and changed, laid out as sites are.

Most are hook points of the Bridge. Some of its hook points show an activation in another layout, or stay silent unless they are
hooked in the Bridge's own way; those are stood in for here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Shown:
    """A point that shows a module's output in another layout.

    ``show`` turns the output into what hooks see; ``hide(output, new)`` turns what they return into the output that flows on,
    bit for bit the same where nothing changed.
    """

    name: str
    module: nn.Module
    show: Callable[[Any], Tensor]
    hide: Callable[[Any, Tensor], Any]
    flat: bool = False

    def register_forward_hook(self, function: Callable[[Any, Any, Tensor], Tensor | None]) -> Any:
        """Put a function on the point; the handle takes it off again."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            shown = self.show(output)
            new = function(module, inputs, shown)
            # what was only looked at flows on as it is, so that what is shown stays a branch of it
            return None if new is None or new is shown else self.hide(output, new)

        return self.module.register_forward_hook(hook)


def points_of(bridge: TransformerBridge) -> dict[str, Any]:
    """Every hook name of a bridge, aliases included, and the point that it leads to."""
    points = dict(bridge.hook_dict)
    stand_ins = {shown.name: shown for shown in _stand_ins(bridge)}
    return {name: stand_ins.get(str(point.name), point) for name, point in points.items()} | stand_ins


def _stand_ins(bridge: TransformerBridge) -> Iterator[Shown]:
    from transformer_lens.hook_points import HookPoint

    for module in bridge.modules():
        if isinstance(module, HookPoint) and module.pos_dim == 2 and str(module.name).endswith((".hook_q", ".hook_k", ".hook_v")):
            yield Shown(str(module.name), module, _transposed, lambda output, new: new.transpose(1, 2))
        elif hasattr(conversion := getattr(getattr(module, "hook_in", None), "hook_conversion", None), "batch_seq"):
            yield from (_by_row(child, conversion) for child in module.children() if isinstance(child, HookPoint))
    scale = float(getattr(bridge.embed, "_output_contribution_scale", 1.0))
    if scale != 1.0:
        yield _scaled(str(bridge.embed.hook_out.name), bridge.embed, scale)
    for block in bridge.blocks:
        scale = float(getattr(block, "residual_contribution_scale", 1.0))
        if scale != 1.0:
            for part in ("attn", "mlp"):
                point, module = getattr(block, f"hook_{part}_out", None), block.submodules.get(getattr(block, f"scaled_{part}_submodule"))
                if isinstance(point, HookPoint) and module is not None:
                    yield _scaled(str(point.name), module, scale)
        if type(block.original_component).__module__.endswith("modeling_openai"):
            yield _listed(str(block.hook_out.name), block.original_component)


def _transposed(output: Tensor) -> Tensor:
    """``[row, head, pos, d_head]``, as latent attention holds it, by position and head."""
    return output.transpose(1, 2)


def _by_row(point: Any, conversion: Any) -> Shown:
    """``[row * pos, d]``, as OPT's MLPs run, by row and position; the Bridge's block notes how many there are of each."""
    return Shown(
        str(point.name),
        point,
        lambda output: output.reshape(*conversion.batch_seq, *output.shape[1:]) if output.ndim == 2 else output,
        lambda output, new: new.flatten(0, 1) if output.ndim == 2 else new,
        flat=True,
    )


def _scaled(name: str, module: nn.Module, scale: float) -> Shown:
    """What is added to the stream, where the model multiplies a module's output as it adds it (Granite)."""

    def show(output: Any) -> Tensor:
        return _first(output) * scale

    def hide(output: Tensor | tuple[Any, ...], new: Tensor) -> Any:
        own = _first(output).detach()
        # the output moves by the difference, which leaves the bits alone where nothing changes
        moved = own + (new - own * scale) / scale
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    return Shown(name, module, show, hide)


def _first(output: Tensor | tuple[Any, ...]) -> Tensor:
    """What a module gives, without what some give beside it (attention patterns, a cache)."""
    return output[0] if isinstance(output, tuple) else output


def _listed(name: str, module: nn.Module) -> Shown:
    """The first of the list that a block of the first GPT returns, which the Bridge lets pass unseen."""
    return Shown(name, module, lambda output: output[0], lambda output, new: [new, *output[1:]])
