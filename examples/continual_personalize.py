"""Teaches a text-to-image model concept after concept; without arguments, the package's tiny base and its five concepts.

accelerate launch examples/continual_personalize.py
accelerate launch examples/continual_personalize.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
    --concepts concepts.json --strategy lora --output_dir outputs/lora
"""

from funlora_hf.personalization.command import main


if __name__ == "__main__":
    main()
