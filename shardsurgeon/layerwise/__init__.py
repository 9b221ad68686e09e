"""The model run one decoder layer at a time. Only this package computes with torch."""
