"""Summaries with every figure measured."""

import math

from kava_trainer.reports.summary import RunSummary, Throughput, Verdict

EVIL = "<script>alert(1)</script> </pre> $x$ & \"'"


def lookup(summary, place):
    value = summary
    for part in place.split("."):
        value = (value or {}).get(part)
    return value


def history_of(steps=60):
    """Log lines of a made-up training: a probe at the start and in the middle, and a line every 10 steps."""
    lines = []
    for step in range(0, steps + 1, 10):
        share = step / steps
        if step:
            lines.append({
                "step": step, "loss": 30 - 20 * share, "mercator_loss": 1 - 0.9 * share, "lm_loss": 6 - 5 * share,
                "kd_loss": 2 - share, "cos_sim": 0.1 + 0.87 * share, "learning_rate": 1e-3 * (1 - share),
                "projector_learning_rate": 3e-3 * (1 - share), "collapsed": 0.0, "tokens_per_second": 5000 + step,
                "peak_memory_bytes": 600_000_000 + step,
            })  # fmt: skip
        if step in (0, steps // 2):
            lines.append({
                "step": step, "probe_cos_sim": 0.1 + share, "probe_centred_cos_sim": share,
                "probe_shuffled_cos_sim": 0.1, "probe_margin": share, "probe_cka": 0.3 + share / 2,
                "probe_student_effective_rank": 50.0, "probe_target_effective_rank": 60.5,
                "probe_teacher_effective_rank": 61.5, "probe_lm_gradient_share": 0.25, "probe_collapsed": 1 - share * 2,
            })  # fmt: skip
    return [*lines, {"step": steps, "train_runtime": 12.5}]


def make_summary(history=None, **arguments):
    """A summary with every figure measured, and with texts that are HTML."""
    asked = {"teacher_model_name_or_path": EVIL, "student_model_name_or_path": "me/student", "dataset_name": "data",
             "learning_rate": 1e-3, **arguments}  # fmt: skip
    summary = RunSummary(asked, {"python": "3.11", "device": EVIL}, f"python run_kava.py {EVIL}")
    summary.add_training(history_of() if history is None else history, 60)
    names = vars(summary.content.final)
    summary.add_final({f"eval_{name}": 0.123456 + index for index, name in enumerate(names)})
    summary.content.final.cos_sim, summary.content.final.margin = 0.961234, 0.7654321
    summary.content.cos_sim_at = {"50": 0.812345, "100": -0.25, "200": 0.9}
    problems = [{"prompt": f"{EVIL} {number}", "reference": "18"} for number in range(10)]
    for index, who in enumerate(vars(summary.content.evaluation)):
        entropy = 0.0123456 * (index + 1)
        summary.add_evaluation(
            who,
            {
                "perplexity": math.exp(entropy),
                "cross_entropy": entropy,
                "exact_match": index / 7,
                "retention_cross_entropy": 2.5 + index,
            },
        )
        summary.add_answers(who, problems, ["18" if index % 2 else f"{EVIL} of {who}"] * 12, str.__eq__)
    figures = {name: 1234.5 + index for index, name in enumerate(vars(summary.content.throughput))}
    figures |= {"padding_fraction": 0.125, "peak_memory_bytes": 1_234_567_890, "estimated_memory_bytes": 2_000_000}
    summary.content.throughput = Throughput(**figures)
    summary.content.verdict = Verdict(success=True, collapsed=False, reasons=["All went well.", EVIL])
    summary.content.problems = [{"step": 3, "kind": "oom", "action": EVIL}]
    return summary


FEW = [{"step": step, "cos_sim": 0.1 + step / 100} for step in (10, 60)]
"""Log lines with one chart, for tests of something else: drawing takes its time."""
