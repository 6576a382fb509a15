"""Models that are trained beside the policy and score what it did; one module each, see `side.base.SideModel`."""
