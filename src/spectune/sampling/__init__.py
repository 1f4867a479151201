"""Draw pictures with a running model.

* generate: text to image with the schedulers of diffusers.
* terminal_ddim: DDIM for schedules with zero terminal SNR.
* contact_sheet: pictures side by side, with captions and PSNR.
"""
