"""How fast models are and how near their pictures are to one another: timing, image metrics, reports."""
