"""One module per paper, named as the paper is, and what only methods share: distiller (synthesise, then distil),
text_distiller (the same for sentences), generative, inversion. Rivals and what can be read without the method stand
beside it: as_dfd_baselines, grafting_baselines, grafting_fskd, grafting_blocks, impression_space, impression_stages,
out_of_domain (MosaicKD's images at hand), feature_amalgamation (the closed forms of comprehensive), ensembles (of
teachers, and amalgamation's metrics).

Imports training, models, measures and what lies below them; a method never imports the front door or the book.
"""
