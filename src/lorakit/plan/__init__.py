"""Estimate the cost of a run before it starts, from the model's shape alone: parameters, memory, FLOPs, time, sizes.

This package does not import torch, load models or measure speed. Shapes come from `catalogue` or `lorakit.hub`.
"""

from lorakit.architectures.shapes import ModelShape, SiteShape
from lorakit.plan import catalogue
from lorakit.plan.budget import bytes_of, with_job, within
from lorakit.plan.choosing import choose_parallel
from lorakit.plan.estimating import Plan, estimate
from lorakit.plan.job import MALLOC_SHARES, Job, Speed
from lorakit.plan.memory import Memory
from lorakit.plan.parallel import Cluster
from lorakit.plan.params import count, rank_table
from lorakit.plan.text import details, render, render_parallel, summary

__all__ = [
    "MALLOC_SHARES",
    "Cluster",
    "Job",
    "Memory",
    "ModelShape",
    "Plan",
    "SiteShape",
    "Speed",
    "bytes_of",
    "catalogue",
    "choose_parallel",
    "count",
    "details",
    "estimate",
    "rank_table",
    "render",
    "render_parallel",
    "summary",
    "with_job",
    "within",
]
