"""`conclave plan MODEL`: what goes where, what it takes and how fast it can be, without weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from deploy.config import ConfigError, parse_options
from deploy.plan_choice import alternatives, choose
from deploy.plan_model import PlannedModel, planned_model
from deploy.plan_options import PlanArgs
from deploy.plan_report import report
from deploy.printable import printable


def plan_model(options: Mapping[str, Any], *, as_json: bool) -> int:
    """Print a plan; 0 when it fits, 1 with reasons and the nearest that does if not.

    Raises ConfigError for an option that is wrong.
    """
    args = parse_options(PlanArgs, options)
    try:
        model = planned_model(args.model)
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        print(f"cannot be planned for: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    plan = make_plan(args, model)
    if as_json:
        print(json.dumps(plan, indent=2))
    else:
        from rich.console import Console

        from deploy.plan_table import print_plan

        print_plan(Console(), plan)
    return 0 if plan["fits"] else 1


def make_plan(args: PlanArgs, model: PlannedModel) -> dict[str, Any]:
    """The object that `--json` prints. Raises ConfigError."""
    longest = model.config.max_position_embeddings
    if args.context is not None and args.context > longest:
        raise ConfigError(f"context={args.context}: allowed values are 2..{longest}")
    choice = choose(model.config, args)
    nearby = () if choice.fits else tuple(alternatives(model.config, choice))
    return report(model, choice, nearby)
