"""Compositions of models: latent diffusion, cascades, unCLIP. Each stage is a model like any other."""

from fluvial.systems.autoencoder import Autoencoder, Posterior, load_autoencoder, tiny_autoencoder
from fluvial.systems.autoencoder_training import reconstructions, train_autoencoder
from fluvial.systems.autoregressive import AutoregressivePrior, train_autoregressive_prior
from fluvial.systems.base import System
from fluvial.systems.captions import Captioned, open_captioned
from fluvial.systems.cascade import Cascade
from fluvial.systems.cascade_network import Upsampler, upsampler
from fluvial.systems.cascade_stages import stage_model, stage_source
from fluvial.systems.clip import CLIP
from fluvial.systems.clip_training import train_clip
from fluvial.systems.folders import load
from fluvial.systems.latent import Latent
from fluvial.systems.latent_run import begin_latent_run, diffusers_pipe, open_latents, standardising_vae
from fluvial.systems.latent_source import Latents, latents
from fluvial.systems.parts import describe_part
from fluvial.systems.unclip import UnCLIP
from fluvial.systems.unclip_networks import Decoder, Prior, with_null
from fluvial.systems.unclip_training import Embedded, embedded, train_decoder, train_prior
from fluvial.systems.upsampling import CLEAN, Augmentation, StageSource

__all__ = [
    "CLEAN",
    "CLIP",
    "Augmentation",
    "Autoencoder",
    "AutoregressivePrior",
    "Captioned",
    "Cascade",
    "Decoder",
    "Embedded",
    "Latent",
    "Latents",
    "Posterior",
    "Prior",
    "StageSource",
    "System",
    "UnCLIP",
    "Upsampler",
    "begin_latent_run",
    "describe_part",
    "diffusers_pipe",
    "embedded",
    "latents",
    "load",
    "load_autoencoder",
    "open_captioned",
    "open_latents",
    "reconstructions",
    "stage_model",
    "stage_source",
    "standardising_vae",
    "tiny_autoencoder",
    "train_autoencoder",
    "train_autoregressive_prior",
    "train_clip",
    "train_decoder",
    "train_prior",
    "upsampler",
    "with_null",
]
