"""What `real_pair.py` compares: the shapes of the students, and the ways of training them."""

from typing import Any

BASE: dict[str, Any] = {
    "max_length": 512, "max_train_samples": 2000, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine", "weight_decay": 0.0, "student_dtype": "float32", "bf16": True, "use_cpu": True,
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "plain_output": True, "logging_steps": 10,
    "calibration_tokens": 8192,
}  # fmt: skip
"""Of every run: steps of 4 examples, weights in float32 and products in bfloat16."""

HALF_WIDTH = "half_width"
"""Stands for a config of half the teacher's width, in all its layers; such a student starts from random weights."""

TRAINED = "trained_before"
"""Stands for the student of 15 layers after a training with the next-token loss alone."""

RATES = (3e-4, 6e-4, 1e-3)

_KEPT = (0, 1, 2, 8, 9, 10, 11, 15, 19, 20, 23, 24, 27, 28, 29)
"""Of the student of 15 layers."""

SHAPES: dict[str, dict[str, Any]] = {
    "24 of 30": {
        "student_layers": "[0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 27, 28, 29]"
    },
    "20 of 30": {"student_layers": "[0, 1, 2, 8, 9, 10, 11, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 27, 28, 29]"},
    "15 of 30": {"student_layers": str(list(_KEPT))},
    "half width, random": {"student_config_name": HALF_WIDTH},
    "15 layers, trained before": {"student_model_name_or_path": TRAINED},
    "1024 of 1536 neurons": {"student_init": "teacher_layers", "student_intermediate_size": 1024},
}
"""The layers are those that `student_num_layers` with `student_layers` importance keeps: the search took them once."""

_LEAST: dict[str, Any] = {"mercator_weight": 0.0, "kd_weight": 0.0, "mse_weight": 0.0, "relative_mse_weight": 0.0}
_NO_LM = {"lm_weight": 0.0}
_INHERITED = {"projector_direction": "none", "layer_mapping": "inherited"}
_KD_ANSWERS = {"kd_weight": 1.0, "kd_tokens": "answers"}
_KD_ALL = {"kd_weight": 1.0, "kd_tokens": "all"}
_RELATIVE = {**_INHERITED, "relative_mse_weight": 3.0}
_PROJECTED = {
    "mercator_weight": 3.0, "layer_mapping": "last", "projector_direction": "student_to_teacher",
    "projector_init": "least_squares",
}  # fmt: skip
_MERCATOR = {**_INHERITED, "mercator_weight": 3.0}
_SAME_LAYERS = {
    **_RELATIVE, "layer_mapping": str([[place, layer + 1] for place, layer in enumerate(_KEPT, start=1)]),
}  # fmt: skip
"""What `inherited` is for a student that was cut before."""
_ROLLOUTS = {"on_policy_fraction": 0.5, "on_policy_max_new_tokens": 128, "per_device_eval_batch_size": 8}

ARMS: dict[str, dict[str, Any]] = {
    "SFT": _LEAST,
    "SFT on all tokens": {**_LEAST, "lm_tokens": "all"},
    "KD on answers": {**_LEAST, **_NO_LM, **_KD_ANSWERS},
    "KD on all": {**_LEAST, **_NO_LM, **_KD_ALL},
    "SFT + KD on answers": {**_LEAST, **_KD_ANSWERS},
    "SFT + KD on all": {**_LEAST, **_KD_ALL},
    "hidden (relative)": {**_LEAST, **_NO_LM, **_RELATIVE},
    "SFT + hidden (Mercator)": {**_LEAST, **_MERCATOR},
    "SFT + hidden (relative)": {**_LEAST, **_RELATIVE},
    "SFT + KD on all + hidden (Mercator)": {**_LEAST, **_KD_ALL, **_MERCATOR},
    "SFT + KD on all + hidden (relative)": {**_LEAST, **_KD_ALL, **_RELATIVE},
    "SFT + KD on all (weight 0.5) + hidden (relative, weight 15)": {
        **_LEAST, **_KD_ALL, **_RELATIVE, "kd_weight": 0.5, "relative_mse_weight": 15.0,
    },
    "SFT + KD on all (weight 0.5)": {**_LEAST, **_KD_ALL, "kd_weight": 0.5},
    "defaults": {},
    "SFT + projected last layer": {**_LEAST, **_PROJECTED},
    "SFT + KD on all + projected last layer": {**_LEAST, **_KD_ALL, **_PROJECTED},
    "SFT + KD on all + projected last layer (weight 0.3)": {
        **_LEAST, **_KD_ALL, **_PROJECTED, "mercator_weight": 0.3,
    },
    "SFT + KD on answers + projected last layer (weight 0.3)": {
        **_LEAST, **_KD_ANSWERS, **_PROJECTED, "mercator_weight": 0.3,
    },
    "SFT + KD on answers + same layers (relative)": {**_LEAST, **_KD_ANSWERS, **_SAME_LAYERS},
    "half on-policy: SFT + KD on answers": {**_LEAST, **_KD_ANSWERS, **_ROLLOUTS},
    "half on-policy: SFT + KD on answers + same layers (relative)": {
        **_LEAST, **_KD_ANSWERS, **_SAME_LAYERS, **_ROLLOUTS,
    },
}  # fmt: skip
"""`hidden` aligns each layer with the teacher layer that it was cut from, the last one after the final norm."""
