"""`gcpo study`: what each part of the method does, on the demo's model in minutes or on another one unchanged."""
