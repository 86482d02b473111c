"""Small networks of Keras' applications as ONNX, written in a process of their own: TensorFlow is slow and loud.

`python keras_exporter.py FOLDER v1:export v2:from_keras ...` with KERAS_BACKEND set writes FOLDER/v1_export.onnx and so
on, with random variables, and beside them pictures.npy and what Keras itself gives for them, v1.npy.
"""

import sys
from pathlib import Path

import keras
import numpy as np
from keras.src.applications import resnet  # the public functions make whole networks only

SIZE = 65
SHAPE = (None, SIZE, SIZE, 3)
RANGES = {
    "gamma": (0.5, 1.0),
    "beta": (-0.1, 0.1),
    "bias": (-0.1, 0.1),
    "moving_mean": (-0.1, 0.1),
    "moving_variance": (0.5, 1.5),
}


def small(version, first, second):
    """Two stages of two blocks; their strides are the version's own."""
    stack = {"v1": resnet.stack_residual_blocks_v1, "v2": resnet.stack_residual_blocks_v2}[version]
    options = {"classes": 5, "input_shape": SHAPE[1:], "weights": None, "classifier_activation": "softmax"}
    return resnet.ResNet(
        lambda x: stack(stack(x, 4, 2, stride1=first, name="a"), 8, 2, stride1=second, name="b"),
        preact=version == "v2",
        use_bias=True,
        **options,
    )


NETWORKS = {
    "v1": lambda: small("v1", 1, 2),
    "v2": lambda: small("v2", 2, 1),
    "resnet50v2": lambda: keras.applications.ResNet50V2(weights=None, input_shape=SHAPE[1:], classes=5),
}


def randomise(model):
    random = np.random.default_rng(0)
    for variable in model.variables:
        name, shape = variable.path.split("/")[-1], variable.shape
        if name == "kernel":
            fan = (3 / np.prod(shape[:-1])) ** 0.5
            variable.assign(random.uniform(-fan, fan, shape))
        elif name in RANGES:
            variable.assign(random.uniform(*RANGES[name], shape))


def export(model, way, path):
    if way == "export":
        model.export(path, format="onnx", verbose=False)
        return
    import tensorflow as tf
    import tf2onnx

    inputs = [tf.TensorSpec(SHAPE, tf.float32, name="x")]
    if way == "from_keras":
        tf2onnx.convert.from_keras(model, inputs, output_path=path)
    else:
        function = tf.function(lambda x: model(x, training=False), input_signature=inputs)
        first = ["x:0"] if way == "channels_first" else None
        tf2onnx.convert.from_function(function, inputs, inputs_as_nchw=first, output_path=path)


def main():
    folder = Path(sys.argv[1])
    pictures = np.random.default_rng(1).normal(size=(2, *SHAPE[1:])).astype(np.float32)
    np.save(folder / "pictures.npy", pictures)
    models = {}
    for case in sys.argv[2:]:
        name, way = case.split(":")
        if name not in models:
            models[name] = NETWORKS[name]()
            randomise(models[name])
            np.save(folder / f"{name}.npy", keras.ops.convert_to_numpy(models[name](pictures)))
        export(models[name], way, str(folder / f"{name}_{way}.onnx"))


if __name__ == "__main__":
    main()
