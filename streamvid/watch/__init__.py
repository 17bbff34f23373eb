"""Standing questions: rules, triggers, and alerts that arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamvid.lazy import lazily

if TYPE_CHECKING:
    from streamvid.watch.actions import Action, Command, Jsonl, NotDelivered, Webhook, parse_action
    from streamvid.watch.alerts import Alert, Alerts, Queued, State
    from streamvid.watch.courier import Courier
    from streamvid.watch.rules import Rule, When, parse_duration, read_rules
    from streamvid.watch.trigger import Candidate, Trigger
    from streamvid.watch.truth import Known, Verdict, expected, match, read_truth

# A process that only delivers does without torch.
_HOMES = {
    "actions": ("Action", "Command", "Jsonl", "NotDelivered", "Webhook", "parse_action"),
    "alerts": ("Alert", "Alerts", "Queued", "State"),
    "courier": ("Courier",),
    "rules": ("Rule", "When", "parse_duration", "read_rules"),
    "trigger": ("Candidate", "Trigger"),
    "truth": ("Known", "Verdict", "expected", "match", "read_truth"),
}
__getattr__ = lazily(__name__, _HOMES)

__all__ = [
    "Action",
    "Alert",
    "Alerts",
    "Candidate",
    "Command",
    "Courier",
    "Jsonl",
    "Known",
    "NotDelivered",
    "Queued",
    "Rule",
    "State",
    "Trigger",
    "Verdict",
    "Webhook",
    "When",
    "expected",
    "match",
    "parse_action",
    "parse_duration",
    "read_rules",
    "read_truth",
]
