"""What stands behind `gcpo COMMAND`: flags in, printed text out."""
