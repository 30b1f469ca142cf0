"""Networks that diffusers lacks, such as TripoSG, MIDI-3D, Wan-Alpha's RGBA VAE and quantized layers."""
