"""Networks that diffusers lacks: TripoSG, MIDI-3D, RGBA VAE, joint attention, quantized layers."""
