"""GRPO and GCPO side by side on a CPU, and the small models this runs on."""
