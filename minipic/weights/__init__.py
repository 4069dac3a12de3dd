"""Files of weights in and out: models, LoRAs, embeddings and ControlNets, checked and renamed."""

from minipic.weights.files import read_weights, save_weights
from minipic.weights.lora import load_lora, save_lora

__all__ = ["load_lora", "read_weights", "save_lora", "save_weights"]
