"""Tables of experiments and results of their runs, small and made up."""

import yaml

CONFIG = "configs/shapes/rpn_only.yaml"


def write_table(path, rows, **content):
    path.write_text(yaml.safe_dump({"rows": rows, **content}))
    return path


def row(name="rpn", **content):
    return {"name": name, "label": name.upper(), "config": CONFIG, **content}


def result(seed=1, recall=20.0, **metrics):
    return {
        **{"label": "RPN", "seed": seed, "commit": "abc1234", "config": "configs/a.yaml"},
        "row": "rpn",
        "training": {
            **{"iterations": 10000, "seconds_per_iteration": 0.5, "peak_memory_mb": None},
            "datasets": ["a", "b"],
        },
        "metrics": {"box_proposals": {"AR@100": recall}, **metrics},
    }
