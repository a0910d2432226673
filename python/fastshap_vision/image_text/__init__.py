"""Models of images and texts: transformers' and open_clip's, and what of an image and of a text makes them match."""
