from . import plot as plot
from .api.atlases import apply as apply
from .api.atlases import export_atlas as export_atlas
from .api.autoencoders import compare as compare
from .api.autoencoders import evaluate_sae as evaluate_sae
from .api.autoencoders import export_sae as export_sae
from .api.autoencoders import latent_effects as latent_effects
from .api.autoencoders import train_sae as train_sae
from .api.pages import make_report as make_report
from .api.pages import ratings as ratings
from .api.statistics import FeatureStats as FeatureStats
from .api.statistics import GroupStats as GroupStats
from .api.statistics import class_counts as class_counts
from .api.statistics import export_stats as export_stats
from .api.statistics import feature_stats as feature_stats
from .api.statistics import patient_counts as patient_counts
from .api.stores import build_store as build_store
from .api.stores import build_stores as build_stores
from .api.stores import import_embeddings as import_embeddings
from .api.stores import verify_store as verify_store
from .errors import UserError as UserError

__version__: str
