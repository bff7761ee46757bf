"""One visual language for figures and pages: colours by meaning, one type family. Leaves: names and hex codes."""

from __future__ import annotations

INK, MUTED, RULE, TINT, PAPER = "#17203D", "#5E6680", "#C9CDD8", "#F3F1EB", "#FFFFFF"
OURS, ROUTER, LINK, ATTENTION = "#E4512F", "#D9A21B", "#138A83", "#5B6FA8"
FONT = "Source Sans Pro"

# Engines: ours in the one loud colour, peers in greys and blues, cited ones hatched.
ENGINE_COLOURS = {
    "flexmoe": OURS,
    "vllm": "#8391BD",
    "hf-best": "#A9AEBB",
    "hf-default": "#C3C7D0",
    "hf-best cited": "#A9AEBB",
    "hf-default cited": "#C3C7D0",
    "flexflow-course": "#8391BD",
}
CITED = ("vllm", "hf-best cited", "hf-default cited", "flexflow-course")

OPERATION_COLOURS = {
    "qkv": "#8391BD",
    "decode_attention": ATTENTION,
    "o": "#A9B4D4",
    "route": ROUTER,
    "topk": "#E8C468",
    "group_by_expert": "#F1DCA2",
    "expert_gate_up_grouped": OURS,
    "expert_down_grouped": "#F08E73",
    "combine": LINK,
}
COLOURS = {"ink": INK, "muted": MUTED, "rule": RULE, "tint": TINT, "ours": OURS, "router": ROUTER, "link": LINK}
COLOURS |= {"attention": ATTENTION, "peer": "#8391BD"}
