"""`gcpo study`: what each part of the method does, on small models made on the spot or on another one unchanged."""
