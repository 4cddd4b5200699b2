"""Placements under a memory budget: einfold's beside baselines, a lower bound and the exact optimum."""
