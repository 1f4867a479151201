"""Draw pictures with a running model.

* stages: draw pictures, with one kind of network at a time.
* generate: sample latents with the schedulers of diffusers.
* terminal_ddim: DDIM for schedules with zero terminal SNR.
* prompts: read a file of prompts in the format of sd-scripts.
* limits: the limits of sizes, guidance and pictures drawn at once.
* contact_sheet: pictures side by side, with captions and PSNR.
* fonts: the text of sheets, in all scripts for which the computer has a font.
"""
