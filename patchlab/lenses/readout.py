"""Readouts: what a state of the residual stream says about the next token, or about the metric of a task."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from patchlab.errors import LensError
from patchlab.lenses.attributions import Attributions, attributions
from patchlab.lenses.distributions import Distributions, distributions, fidelity
from patchlab.lenses.files import read_maps, write_maps
from patchlab.lenses.head import head_logits
from patchlab.lenses.linear_map import LinearMap
from patchlab.lenses.rows import Prompts, rows_of
from patchlab.models import Model
from patchlab.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Readout:
    """A map from states of the residual stream, ``[layer, pos]``, to token distributions or attributions.

    A state after layer l goes through that layer's map, and then through the model's own final norm and unembedding. Where there is no map, from
    layer ``direct_from`` on, states are read as they are. So :func:`logit_lens` has no maps, :func:`~patchlab.lenses.fit_linear` fits affine
    ones, and :func:`~patchlab.lenses.fit_jacobian` takes mean Jacobians.

    Attributes:
        name: as results show it.
        maps: by layer, of what is in the stream after the block (resid_post).
        direct_from: layers from this one on need no map.
        provenance: how the maps were made.
        quality: of a fit, on rows that it did not see (:meth:`fidelity`); None where there was none.
    """

    name: str
    maps: Mapping[int, LinearMap] = field(default_factory=dict[int, LinearMap], repr=False)
    direct_from: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    quality: pd.DataFrame | None = field(default=None, repr=False)

    def layers(self, model: Model) -> tuple[int, ...]:
        """The layers whose states it reads."""
        return tuple(layer for layer in range(model.arch.n_layers) if layer in self.maps or layer >= self.direct_from)

    def map_of(self, layer: int) -> LinearMap | None:
        """The map of a layer; None where states are read as they are.

        Raises:
            LensError: the readout has none for this layer.
        """
        if layer in self.maps or layer >= self.direct_from:
            return self.maps.get(layer)
        raise LensError(f"the readout {self.name} has no map for layer {layer}; it has {', '.join(map(str, sorted(self.maps))) or 'none'}.")

    def logits(self, model: Model, states: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows vocab"]:
        """The logits that states after a layer give.

        Raises:
            LensError: no map for this layer, another width, or a model whose head cannot be read.
        """
        self.check(model)
        own = self.map_of(layer)
        return head_logits(model, states if own is None else own(states))

    def read(
        self,
        model: Model,
        prompts: Prompts,
        *,
        side: str = "clean",
        site: str = "resid_post",
        layers: Iterable[int] | None = None,
        top: int = 5,
        batch_size: int | None = None,
    ) -> Distributions:
        """Token distributions at every layer and position.

        Args:
            model: whose states are read.
            prompts: a task, a text, texts or rows of token ids of one length.
            side: of a task, ``clean`` or ``corrupted``.
            site: ``resid_post``; a readout without maps also reads ``resid_pre`` and ``resid_mid``.
            layers: which; default all that it has.
            top: how many of the most likely tokens are kept.
            batch_size: rows per forward pass; results do not depend on it.

        Raises:
            LensError: layers, sites or prompts that cannot be read.

        Example:
            >>> pl.lenses.logit_lens().read(model, "When Mary and John went to the store").show()  # doctest: +SKIP
        """
        self.check(model)
        if site != "resid_post" and (self.maps or site not in ("resid_pre", "resid_mid")):
            raise LensError(f"the readout {self.name} reads {'resid_post' if self.maps else 'resid_pre, resid_mid and resid_post'}; got {site!r}.")
        chosen = self.layers(model) if layers is None else tuple(sorted(set(layers)))
        maps = {layer: self.map_of(layer) for layer in chosen}
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < model.arch.n_layers:
            raise LensError(f"layers are numbers from 0 to {model.arch.n_layers - 1}, at least one; got {list(chosen)}.")
        rows = rows_of(model, prompts, side=side, batch_size=batch_size)
        return distributions(model, rows, maps, name=self.name, site=site, top=top)

    def attribute(self, model: Model, task: Task, *, by: str = "component", side: str = "clean", layer: int | None = None) -> Attributions:
        """Direct attribution of the task's metric, as this readout gives it after ``layer``, to what was written into the stream.

        With the last layer (default) the readout is the model itself: this is direct logit attribution. The denominator of the final norm (and of
        norms after attention and MLP) is held at its value, and so is the factor by which a soft cap shrinks a logit; then the contributions,
        those of biases among them, add up to the metric exactly.

        Args:
            model: whose states are attributed.
            task: its metric must be linear in the logits, such as ``logit_diff``.
            by: ``layer``, ``component`` (attention and MLP of each layer), ``head``, ``neuron``; ``feature``, of the dictionaries on attn_out and
                mlp_out that the model was given (:meth:`patchlab.Model.add_dictionaries`), or ``state``, of the one on the state itself (resid_post).
            side: of the task, ``clean`` or ``corrupted``.
            layer: after which the stream is read; default the last.

        Raises:
            MetricError: a metric that is not linear in the logits of the answer position.
            LensError: an unknown unit, no map for this layer, or a model whose stream is not the sum of what its blocks write.
        """
        self.check(model)
        at = model.arch.n_layers - 1 if layer is None else layer
        if not 0 <= at < model.arch.n_layers:
            raise LensError(f"layer is {layer}; {model.name} has the layers 0 to {model.arch.n_layers - 1}.")
        return attributions(model, rows_of(model, task, side=side), self.map_of(at), at, by=by, name=self.name)

    def fidelity(self, model: Model, rows: Prompts, *, skip_first: int = 0) -> pd.DataFrame:
        """How well the readout tells the model's output, by layer, over all positions of rows but the first few.

        Returns:
            Columns ``layer``; ``r2`` of the mapped state for the last state, against its mean (1 is exact); ``kl`` of the model's
            distribution from the readout's, in nats, and ``agreement``, the share of positions where both have the same most likely token.
        """
        self.check(model)
        return fidelity(model, rows_of(model, rows), {layer: self.map_of(layer) for layer in self.layers(model)}, skip_first=skip_first)

    def check(self, model: Model) -> None:
        """Check that the maps fit the model.

        Raises:
            LensError: maps of another width, of layers that the model has not, or fitted on another model of this name.
        """
        for layer, own in self.maps.items():
            if tuple(own.weight.shape) != (model.arch.d_model, model.arch.d_model) or not 0 <= layer < model.arch.n_layers:
                raise LensError(
                    f"the readout {self.name} has a map of shape {list(own.weight.shape)} for layer {layer}, and {model.name} has "
                    f"{model.arch.n_layers} layers of width {model.arch.d_model}: it was made for another model."
                )
        fitted_on = self.provenance.get("model_fingerprint")
        same_dtype = self.provenance.get("fit_dtype") == str(model.dtype).removeprefix("torch.")
        if self.maps and fitted_on is not None and same_dtype and fitted_on != model.fingerprint:
            raise LensError(
                f"the readout {self.name} was fitted on {self.provenance.get('model_name')} with the fingerprint {fitted_on}, and {model.name} has "
                f"{model.fingerprint}: the weights are others. Fit it again, or take dataclasses.replace(readout, provenance={{}}) if that is meant."
            )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the maps to a ``.pt`` file.

        Maps without a bias are written in the layout of published Jacobian lenses (``J`` in float16, ``n_prompts``, ``source_layers``,
        ``d_model``, ``metadata``), which other tools read. Affine maps have no such layout: they are written as ``A`` and ``b``, in their own
        dtype, so that a tool that knows only ``J`` refuses them.

        Raises:
            LensError: nothing to write, or numbers that float16 cannot hold.
            OutputError: an existing file, or a place that cannot be written to.
        """
        return write_maps(path, self.maps, self.direct_from, {**self.provenance, "readout": self.name}, overwrite=overwrite)


def logit_lens() -> Readout:
    """The logit lens: every state is read as if it were the last (nostalgebraist 2020)."""
    return Readout("logit lens")


def load(path: str | os.PathLike[str], model: Model) -> Readout:
    """A readout from a ``.pt`` file: one that :meth:`Readout.save` wrote, a published Jacobian or relevance lens, or TransformerLens' own.

    Nothing in the file is executed: what ``torch.load(weights_only=True)`` refuses is refused.

    Raises:
        LensError: a file that is no lens or would have to be unpickled, or a lens of another model.
    """
    maps, direct_from, record = read_maps(path)
    last = model.arch.n_layers - 1 if direct_from is None else direct_from
    name = str(record.get("readout") or (_named(record)))
    found = Readout(name, maps, last, record)
    found.check(model)
    if direct_from is not None and not 0 <= direct_from < model.arch.n_layers:
        raise LensError(f"{path} was fitted to the output of layer {direct_from}, and {model.name} has {model.arch.n_layers} layers.")
    return found


def _named(record: Mapping[str, Any]) -> str:
    return "relevance lens" if record.get("estimator") == "relp" else "Jacobian lens"
