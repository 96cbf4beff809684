import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network


def pytest_configure(config):
    # PEFT warns whenever a second adapter joins a model, which is what scfm.lora does on purpose
    config.addinivalue_line("filterwarnings", "ignore:Already found a `peft_config`")
