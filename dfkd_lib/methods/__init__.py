"""One module per paper, named as the paper is, and what only methods share: distiller (synthesise, then distil),
text_distiller (the same for sentences), generative, inversion. Where a paper fills more than one module, the others
bear its name before their own: as_dfd_baselines, impression_space, impression_stages.

Imports training, models, measures and what lies below them; a method never imports the front door or the book.
"""
