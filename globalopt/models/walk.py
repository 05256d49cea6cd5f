"""Walk the decoder blocks one at a time, and accumulate the Gram of every input site.

Both analysis and refinement walk: one reads the dense blocks, the other changes each before the next one is visited.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from globalopt.errors import CalibrationError, UnknownNameError
from globalopt.kernels.second_moment import add_second_moment, mirror
from globalopt.machine import ranks
from globalopt.machine.memory import trim_memory
from globalopt.models.block_runner import BlockRunner
from globalopt.models.hooks import input_hooks
from globalopt.values.entries import all_finite
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram

SAMPLED = 4
"""Every how many batches one is read for correlations that are only reported."""


class BlockVisit:
    """Give access to one block during a walk: its module, its layers, and its inputs.

    `inputs` are the hidden states (b, t, d) that enter the block, by batch.

    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> runner = BlockRunner(find_layers(tiny_llama()), [Batch(torch.tensor([[5, 6, 7, 8]]))])
    >>> visit = next(walk_blocks(runner))
    >>> {site.removeprefix("model.layers.0."): tuple(gram.matrix.shape) for site, gram in visit.grams().items()}
    {'self_attn.q_proj': (16, 16), 'self_attn.o_proj': (16, 16), 'mlp.gate_proj': (16, 16), 'mlp.down_proj': (24, 24)}
    """

    def __init__(self, runner: BlockRunner, index: int, inputs: list[Tensor]) -> None:
        self.index = index
        self.module: nn.Module = runner.layers.blocks[index]
        self.specs: tuple[LayerSpec, ...] = runner.layers.of_block(index)
        self.inputs = inputs
        self.layers = runner.layers
        self.runner = runner
        self._outputs: list[Tensor] | None = None

    def grams(self, sites: Sequence[str] | None = None, exact: bool = True) -> dict[str, Gram]:
        """Compute the Gram `G = mean over real tokens of x xᵀ` of each input site, in one forward pass of the block.

        With several processes the mean is over the tokens of all, and all get it. The outputs of that pass are kept, so
        that an unchanged block is not run again when the walk goes on. Where no token reached a site, its Gram is the
        mean of those of the site's siblings (`LayerSpec.siblings`: the other experts), or the identity, which is about
        what a norm leaves; its `tokens` are 0.

        Args:
            sites: which sites; all of this block by default.
            exact: whether all tokens are read for the correlations between coordinates. Otherwise those of every
                `SAMPLED`-th batch are, and all for the diagonal, for solvers that read nothing else.

        Raises:
            UnknownNameError: a site is not one of this block.
            CalibrationError: a site's inputs are not finite.
        """
        known = dict.fromkeys(spec.site for spec in self.specs)
        wanted = tuple(known) if sites is None else tuple(sites)
        for site in wanted:
            if site not in known:
                raise UnknownNameError("site", site, known)
        found = self._moments(wanted, exact)
        if lacking := [site for site, gram in found.items() if gram is None]:
            stands_for = {site: next(spec for spec in self.specs if spec.site == site) for site in lacking}
            beside = {site: [spec.site for spec in stands_for[site].siblings(self.specs)] for site in lacking}
            found |= self._moments([site for sites in beside.values() for site in sites if site not in found], exact)
            for site, sites in beside.items():
                known = [gram for sibling in dict.fromkeys(sites) if (gram := found[sibling]) is not None]
                found[site] = Gram.stand_in(known, stands_for[site].d_in)
        if self.layers.lazy is not None:
            trim_memory()
        return {site: gram for site in wanted if (gram := found[site]) is not None}

    def _moments(self, sites: Iterable[str], exact: bool) -> dict[str, Gram | None]:
        """Compute the Gram of every site in one forward pass of the block; None where no token reached it."""
        moments = {site: _Moment(site) if exact else _SampledMoment(site) for site in sites}
        if not moments:
            return {}
        self._outputs = [self._observed(i, moments) for i in range(len(self.runner))]
        tokens = ranks.total(torch.tensor([moment.tokens for moment in moments.values()]))
        widths = {spec.site: spec.d_in for spec in self.specs}
        for moment, count in zip(moments.values(), tokens.tolist(), strict=True):
            moment.add_up(count, widths[moment.site], self.runner.layers.device_of(self.index))
        # Each sum is freed when its Gram is made: with wide layers the sums are larger than the block.
        return {site: moments.pop(site).gram() for site in tuple(moments)}

    def outputs(self) -> list[Tensor]:
        """Compute the outputs (b, t, d) of the block, by batch; they are kept until `replaced` is called."""
        if self._outputs is None:
            self._outputs = [self._output(i) for i in range(len(self.runner))]
        return self._outputs

    def replaced(self) -> None:
        """Discard the outputs that are kept, after the block's weights have changed."""
        self._outputs = None

    def _observed(self, i: int, moments: Mapping[str, _Moment]) -> Tensor:
        """Run batch `i` through the block, and add the inputs of its sites to `moments`."""
        batch, layers = self.runner.batches[i], self.runner.layers

        def add(site: str, x: Tensor) -> None:
            moments[site].add(batch.select(x), i)

        with input_hooks({site: layers.module(site) for site in moments}, add):
            return self._output(i)

    @torch.no_grad()
    def _output(self, i: int) -> Tensor:
        """Run batch `i` through the block; `CalibrationError` if the output is not finite."""
        hidden = self.inputs[i]
        output = self.runner.run(self.index, i, hidden).to(hidden.device)
        if not all_finite(self.runner.batches[i].select(output)):
            raise CalibrationError(
                f"Block {self.runner.layers.blocks_path}.{self.index} returns values that are not finite; "
                "use --dtype float32 or bfloat16, and check the layers changed last."
            )
        return self.runner.keep(output)


def walk_blocks(runner: BlockRunner, device: torch.device | str | None = None) -> Generator[BlockVisit, None, None]:
    """Visit the decoder blocks in order, each with the outputs of the one before as its inputs.

    A consumer that only reads sees the dense model; one that changes the block's weights and calls
    `BlockVisit.replaced` makes all later blocks see the changed model. A visit is valid until the next one: its
    inputs are released when the walk goes on.

    Args:
        runner: the model's blocks and the batches.
        device: where to compute; each block is moved there for its visit and back. Hidden states stay where the
            model's embeddings are, or in the runner's scratch folder. By default nothing is moved.

    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> runner = BlockRunner(find_layers(tiny_llama()), [Batch(torch.tensor([[5, 6, 7, 8]]))])
    >>> [(visit.index, len(visit.specs), tuple(visit.inputs[0].shape)) for visit in walk_blocks(runner)]
    [(0, 7, (1, 4, 16)), (1, 7, (1, 4, 16))]
    """
    blocks = runner.layers.blocks
    hidden = [runner.keep(runner.first(i)) for i in range(len(runner))]
    for index in range(len(blocks)):
        with runner.layers.resident(index, device):
            visit = BlockVisit(runner, index, hidden)
            yield visit
            if index + 1 < len(blocks):
                hidden = visit.outputs()
        visit.inputs = []


def visit_blocks(runner: BlockRunner, device: torch.device | str | None = None) -> Iterator[BlockVisit]:
    """Visit the decoder blocks in order without running them: a visit has no inputs, and so no Grams and no outputs.

    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> runner = BlockRunner(find_layers(tiny_llama()), [Batch(torch.tensor([[5, 6, 7, 8]]))])
    >>> [(visit.index, visit.inputs) for visit in visit_blocks(runner)]
    [(0, []), (1, [])]
    """
    for index in range(len(runner.layers.blocks)):
        with runner.layers.resident(index, device):
            yield BlockVisit(runner, index, [])


class _Moment:
    """Accumulate the sum of `x xᵀ` over the tokens of one site, in float32."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.tokens = 0
        self.sum: Tensor | None = None

    def add(self, rows: Tensor, batch: int) -> None:
        """Add rows `x` (tokens, d) of a batch."""
        x = rows.float()
        self._add_products(x)
        self.tokens += len(x)

    def _add_products(self, x: Tensor) -> None:
        if self.sum is None:
            self.sum = x.new_zeros(x.shape[1], x.shape[1])
        add_second_moment(self.sum, x)

    def add_up(self, tokens: int, width: int, device: torch.device) -> None:
        """Add the sums of all processes, which have `tokens` tokens together; one that has none adds zero."""
        if tokens and ranks.several():
            self.sum = ranks.total(torch.zeros(width, width, device=device) if self.sum is None else self.sum)
        self.tokens = tokens

    def gram(self) -> Gram | None:
        """Compute the Gram, the sum divided by the number of tokens, made exactly symmetric; the sum is freed.

        Returns:
            The Gram, or None where no token reached the site.
        Raises:
            CalibrationError: the sum is not finite.
        """
        if self.sum is None or self.tokens == 0:
            return None
        if not all_finite(self.sum):
            raise CalibrationError(
                f"The inputs of layer {self.site} are not finite: the activations overflow or a weight before it is "
                "NaN. Use --dtype float32 or bfloat16."
            )
        mean, self.sum = self.sum.div_(self.tokens), None
        return Gram(mirror(mean), self.tokens)


class _SampledMoment(_Moment):
    """Accumulate the squares of all tokens of one site, and the products of those of every `SAMPLED`-th batch.

    The Gram has the diagonal `D` of all tokens and the correlations `C` of some, `D^1/2 C D^1/2`, and is positive
    semidefinite as `C` is. It costs little more than the squares.
    """

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self.squares: Tensor | None = None

    def add(self, rows: Tensor, batch: int) -> None:
        x = rows.float()
        squares = x.square().sum(0)
        self.squares = squares if self.squares is None else self.squares + squares
        if batch % SAMPLED == 0:
            self._add_products(x)
        self.tokens += len(x)

    def add_up(self, tokens: int, width: int, device: torch.device) -> None:
        super().add_up(tokens, width, device)
        if tokens and ranks.several():
            self.squares = ranks.total(torch.zeros(width, device=device) if self.squares is None else self.squares)

    def gram(self) -> Gram | None:
        if self.squares is None or self.tokens == 0:
            return None
        if self.sum is None:
            # No batch that is read has a token of this site.
            self.sum = torch.diag(self.squares)
        own = self.sum.diagonal().clone()
        scales = torch.where(own > 0, (self.squares / own).sqrt(), 0.0)
        self.sum.mul_(scales[:, None]).mul_(scales)
        # What all tokens that were read have a zero in is correlated with nothing.
        self.sum.diagonal().copy_(self.squares)
        return super().gram()
