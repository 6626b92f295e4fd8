"""What a useful autoencoder looks like, during training and afterwards, and which option to change if it does not."""

from cytosae.sae.registry import ARCHITECTURES
from cytosae_pipeline.config import TrainConfig

_DENSE_SHARE = 0.1
"""Share of active latents above which a single one says little."""
_DEAD_SHARE = 0.1
"""Share of latents that never fire above which much of the autoencoder is wasted."""
_DEAD_AFTER_STEPS = 16
"""Steps without firing after which a latent is called dead, or later if it is revived later: rare latents miss a few
batches."""
_OFF_TARGET = 0.2
"""Relative distance of L0 from a target that only the loss pulls at."""
_FIRST_SHARE = 0.25
"""Share of a run after which it is judged: latents die and are revived in the beginning."""
_SPARSER = {"k": "lower", "l1_coefficient": "raise", "l0_coefficient": "raise"}
"""Which way an option of training must be changed for fewer active latents."""


class Expectations:
    """Says once what is wrong with a run.

    Args:
        config: Options of the run.
        n_latents: Latents S.
        n_steps: Steps of the whole run.
        revive_after_steps: Steps without firing after which a latent is revived.
    """

    def __init__(self, config: TrainConfig, n_latents: int, n_steps: int, revive_after_steps: int) -> None:
        self._config, self._n_latents = config, n_latents
        self.dead_after_steps = max(revive_after_steps, _DEAD_AFTER_STEPS)
        """Steps without firing after which a latent is called dead."""
        warm_up = max(config.warm_up_steps(n_steps), config.l1_warm_up_steps, revive_after_steps)
        self._first = max(warm_up + 1, _FIRST_SHARE * n_steps)
        self._said: set[str] = set()

    def check(self, n_done: int, l0: float, dead_share: float) -> list[str]:
        """What was not said before.

        Args:
            n_done: Steps done.
            l0: Mean number of active latents per token.
            dead_share: Share of latents that have not fired for more than `dead_after_steps` steps.
        """
        if n_done < self._first:
            return []
        config = self._config
        target = config.filled().k if config.arch == "jumprelu" else None
        texts = {
            "dense": explain_dense(config.arch, l0, self._n_latents),
            "dead": explain_dead(config, dead_share, self._n_latents, self.dead_after_steps),
            "target": explain_off_target(l0, target),
        }
        found = [text for kind, text in texts.items() if text and kind not in self._said]
        self._said |= {kind for kind, text in texts.items() if text}
        return found


def explain_dense(architecture: str, l0: float | None, n_latents: int) -> str:
    """What to do about an autoencoder with more than a tenth of its latents active; '' if there are fewer.

    Args:
        architecture: Name of its architecture.
        l0: Mean number of active latents per token; None if it is not known.
        n_latents: Latents S.
    """
    if l0 is None or l0 <= _DENSE_SHARE * n_latents:
        return ""
    kind = ARCHITECTURES[architecture]
    advice = [
        f"{way} --{name}" for name, way in _SPARSER.items() if name in {*kind.setting_names, *kind.training_options}
    ]
    return (
        f"L0 is {l0:,.1f}: {l0 / n_latents:.0%} of the {n_latents:,} latents are active on a token, so a single latent "
        "says little" + (f". To train a sparser one: {' or '.join(advice)}" if advice else "")
    )


def explain_dead(config: TrainConfig, dead_share: float, n_latents: int, n_steps: int) -> str:
    """What to do about a run in which more than a tenth of the latents never fire; '' if there are fewer.

    Args:
        config: Options of the run.
        dead_share: Share of latents that have not fired for more than `n_steps` steps.
        n_latents: Latents S.
        n_steps: Steps without firing after which a latent is called dead.
    """
    if dead_share <= _DEAD_SHARE:
        return ""
    options = ARCHITECTURES[config.arch].training_options
    advice = ["lower --lr"]
    if "aux_coefficient" in options:
        advice.append("raise --aux_coefficient")
    if "pre_act_coefficient" in options and not config.filled().pre_act_coefficient:
        advice.append("give --pre_act_coefficient 0.03125")
    if "use_ghost_grads" in options and not config.use_ghost_grads:
        advice.append("give --use_ghost_grads")
    if config.encoder_init != "decoder":
        advice.append("give --encoder_init decoder")
    return (
        f"{dead_share:.0%} of the {n_latents:,} latents have not fired for more than {n_steps} steps"
        f". For fewer dead ones: {', '.join(advice)}, or lower --expansion_factor"
    )


def explain_off_target(l0: float, k: int | None) -> str:
    """What to do about an L0 that does not follow its target; '' if it does, or if there is none."""
    if k is None or abs(l0 / k - 1) <= _OFF_TARGET:
        return ""
    return f"L0 is {l0:,.1f} and should be {k}. To keep it closer: raise --l0_coefficient, or --bandwidth"
