"""The model run one decoder layer at a time. The one room where torch is at home."""
