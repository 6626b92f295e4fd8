"""The stages and the command line: composes `cytosae` (science) and `cytosae_cache` (storage).

The verbs are functions, with the options of the command line under their own names:

    store = cytosae_pipeline.build_store(dataset_name="mll23", images="mll23", model_path="DinoBloom-B.pth")
    sae = cytosae_pipeline.train_sae(store=store, preset="modern").load()
    stats = cytosae_pipeline.feature_stats(sae, store)     # .sparsity (S,), .top_rows (S, k), ...
    cytosae_pipeline.plot.latent(stats, 430, images="mll23")
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
