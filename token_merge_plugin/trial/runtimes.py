"""Runtimes that models are exported to: how each writes an exported program to a file, runs it, and what is in it.

All of them start from a program of `torch.export`. What a runtime needs is imported when it is asked for.
"""

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from token_merge_plugin.errors import ConfigError, MissingExtraError, how_to_install

# Runs a file on a batch of images; returns the tensors of its output, in order.
Run: TypeAlias = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Contents:
    """What is in a file.

    Attributes:
        form: its format, with the version that decides who can read it.
        operators: {name: how many}, the most frequent first.
        scatters: names of those that write several values to one place and reduce them, which runtimes do differently.
    """

    form: str
    operators: dict[str, int]
    scatters: tuple[str, ...]


class Dynamic(NamedTuple):
    """Which dimensions of the images [B, C, H, W] a file leaves open: the batch, and height and width."""

    batch: bool
    size: bool


def taller(images: Tensor) -> Tensor:
    """Stretch images to [B, C, 2 H, W]: a size that suits all whose steps suit the images, and no square."""
    return images.repeat_interleave(2, dim=2)


class Runtime:
    """A runtime, and the kind of file that it reads.

    Attributes:
        name: as people call it.
        suffix: of its files.
        packages: what has to be installed, brought by the extra.
        on_cpu: whether the model is exported on the CPU, wherever it is.
    """

    name: str
    suffix: str
    packages: tuple[str, ...] = ()
    extra = ""
    on_cpu = False

    def check_installed(self) -> None:
        """Raise MissingExtraError where a package of the runtime is not installed."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(
                    f"{self.name} needs {package}, which is not installed. {how_to_install(package, self.extra)}"
                )

    def version(self) -> str:
        return f"{self.name} {metadata.version(self.packages[0])}" if self.packages else f"torch {torch.__version__}"

    def files(self, path: Path) -> list[Path]:
        """Return the files that may be written for a path, itself last: it is complete when it is there."""
        return [path]

    def program(self, model: nn.Module, images: Tensor, dynamic: Dynamic) -> ExportedProgram:
        """Return the program of a model that takes a batch of one image, or of any number, of one size or of others."""
        shapes: dict[int, Any] = {}
        if dynamic.batch:
            shapes[0] = Dim("batch", min=1)
        if dynamic.size:
            # What sizes a model takes is for the exporter to find out.
            shapes |= {2: Dim.AUTO, 3: Dim.AUTO}
            images = taller(images)
        # From two images: with one, a dimension that is broadcast could not be told from the batch.
        images = images[: 2 if dynamic.batch else 1]
        return torch.export.export(model, (images,), dynamic_shapes=(shapes,) if shapes else None)

    def save(self, program: ExportedProgram, path: Path) -> None:
        raise NotImplementedError

    def load(self, path: Path) -> Run:
        raise NotImplementedError

    def contents(self, program: ExportedProgram, path: Path) -> Contents:
        raise NotImplementedError


class OnnxRuntime(Runtime):
    name = "ONNX Runtime"
    suffix = ".onnx"
    packages = ("onnxruntime", "onnx", "onnxscript")
    extra = "onnx"
    on_cpu = True

    def files(self, path: Path) -> list[Path]:
        return [path.with_name(path.name + ".data"), path]  # of weights that are more than fits into one

    def save(self, program: ExportedProgram, path: Path) -> None:
        outputs = [spec for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
        names = ["output"] if len(outputs) == 1 else [f"output{i}" for i in range(len(outputs))]
        with redirect_stdout(StringIO()):  # it says what it does, whatever `verbose` is
            onnx_program = torch.onnx.export(
                program, dynamo=True, input_names=["images"], output_names=names, verbose=False
            )
        assert onnx_program is not None
        onnx_program.save(path)

    def load(self, path: Path) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: [torch.from_numpy(x) for x in session.run(None, {name: images.numpy()})]

    def contents(self, program: ExportedProgram, path: Path) -> Contents:
        import onnx

        model = onnx.load(path, load_external_data=False)
        nodes = [*_nodes(model.graph), *(node for function in model.functions for node in function.node)]
        reducing = [
            node.op_type
            for node in nodes
            if any(attribute.name == "reduction" and attribute.s != b"none" for attribute in node.attribute)
            and node.op_type.startswith("Scatter")
        ]
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        return Contents(f"ONNX, opset {opsets['']}", _counted(node.op_type for node in nodes), tuple(reducing))


def _nodes(graph: Any) -> Iterator[Any]:
    """Go through the nodes of an ONNX graph, and of the graphs in them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(inner)


class OpenVino(Runtime):
    """OpenVINO on the CPU. It reads the program by way of ONNX: its own reader of programs lacks operators."""

    name = "OpenVINO"
    suffix = ".xml"
    packages = ("openvino", "onnx", "onnxscript")
    extra = "openvino"
    on_cpu = True

    def files(self, path: Path) -> list[Path]:
        return [path.with_suffix(".bin"), path]

    def save(self, program: ExportedProgram, path: Path) -> None:
        import openvino

        onnx_file = path.with_suffix(OnnxRuntime.suffix)
        OnnxRuntime().save(program, onnx_file)
        # Not rounded to half precision, as is the default: what is checked is what is in the file.
        openvino.save_model(openvino.Core().read_model(onnx_file), path, compress_to_fp16=False)

    def load(self, path: Path) -> Run:
        import openvino

        # Without the hint, newer CPUs compute in bfloat16.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.Core().compile_model(path, "CPU", settings)
        # A result is the runtime's own memory, which the next pass writes to.
        return lambda images: [torch.from_numpy(x.copy()) for x in compiled([images.numpy()]).values()]

    def contents(self, program: ExportedProgram, path: Path) -> Contents:
        import openvino

        operators = openvino.Core().read_model(path).get_ops()
        reducing = [
            operator.get_type_name()
            for operator in operators
            if operator.get_type_name().startswith("Scatter")
            and operator.get_attributes().get("reduction", "none") != "none"
        ]
        names = (operator.get_type_name() for operator in operators)
        return Contents("OpenVINO IR", _counted(names), tuple(reducing))


class TorchExport(Runtime):
    name = "torch.export"
    suffix = ".pt2"

    def save(self, program: ExportedProgram, path: Path) -> None:
        torch.export.save(program, path)

    def load(self, path: Path) -> Run:
        module = torch.export.load(path).module()
        return lambda images: tensors_of(module(images))

    def contents(self, program: ExportedProgram, path: Path) -> Contents:
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        reducing = [
            name for name in names if any(part in name for part in ("scatter_add", "scatter_reduce", "index_add"))
        ]
        return Contents(f"{self.name} of torch {torch.__version__}", _counted(names), tuple(reducing))


class AotInductor(TorchExport):
    name = "AOTInductor"

    def save(self, program: ExportedProgram, path: Path) -> None:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))

    def load(self, path: Path) -> Run:
        module = torch._inductor.aoti_load_package(str(path))
        return lambda images: tensors_of(module(images))


RUNTIMES: dict[str, Runtime] = {
    "onnx": OnnxRuntime(),
    "openvino": OpenVino(),
    "torch": TorchExport(),
    "aoti": AotInductor(),
}


def find_runtime(to: str) -> Runtime:
    """Return the runtime of this name, if it is installed.

    Raises:
        ConfigError: there is none of this name.
        MissingExtraError: a package of it is not installed.
    """
    if to not in RUNTIMES:
        raise ConfigError(f"to={to!r} is not known. Choose one of {', '.join(map(repr, RUNTIMES))}.")
    RUNTIMES[to].check_installed()
    return RUNTIMES[to]


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of an output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _counted(names: Any) -> dict[str, int]:
    return dict(Counter(names).most_common())
