"""`python -m mllm_vision.data.scenes`: write the Scenes data set."""

from mllm_vision.data.scenes.scenes import main

if __name__ == "__main__":
    main()
