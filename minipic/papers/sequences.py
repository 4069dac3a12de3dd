"""Tasks as sequences of frames: the frames of each, where they come from, and which are given.

A sequence has the wanted picture and then what belongs to it: a map, pictures to edit, pictures of
a subject. Of multiview it has for each view a picture and its camera's rays. It comes from the
world, or from a folder of one's own with a folder for each task:

    mine/depth2image/target/1.png 1.txt     a wanted picture and its caption
    mine/depth2image/source/1.png           what is given with it; also source2/ and so on
    mine/multiview/kitchen/transforms.json  photos with cameras, see training/posed.py
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minipic.common import InputError, ParameterError
from minipic.latents import encode_pictures, picture_size, read_photos
from minipic.pipeline import Pipeline
from minipic.training.photos import Photo, is_hidden, read_sources
from minipic.training.posed import choose_views, read_scenes
from minipic.training.settings import PhotoSettings
from minipic.world.camera import FOCAL
from minipic.world.pictures import PairPicture, task_pairs
from minipic.world.rays import at_distance, frames_of_cameras

# {task, whose token is [[task]]: the task of the world that it is trained on}
WORLD_TASKS = {
    "text2image": "depth",  # its pictures, without their maps
    "depth2image": "depth",
    "normals2image": "normals",
    "semanticmap2image": "segmentation",
    "boundingbox2image": "boxes",
    "canny2image": "edges",
    "deblurring": "blur",
    "super_resolution": "small",
    "image_inpainting": "masked",
    "image_editing": "edit",
    "multiview": "view",
    "subject_driven": "subject",
}
# Arguments of the world's tasks, for samples of different numbers of frames in equal shares.
VARIANTS = {
    "multiview": ({"views": 2}, {"views": 3}),
    "subject_driven": ({"references": 1}, {"references": 2}, {"references": 3}),
}
POSE = "camera_pose"  # multiview, whose rays are drawn and read


@dataclass(frozen=True)
class Example:
    """One sample. Of views, `pictures` has no rays, and there are cameras [V,3,4]."""

    task: str
    pictures: tuple[Photo | PairPicture, ...]
    text: str
    cameras: torch.Tensor | None = None
    focal: float = FOCAL


# From the world or a folder -----------------------------------------------------------------------

def examples_of_world(
        task: str, pipeline: Pipeline, config: PhotoSettings, first: int,
        count: int) -> list[Example]:
    """Samples first to first + count - 1 of a task, of each number of frames about as many."""
    size = picture_size(pipeline, config)
    variants = VARIANTS.get(task, ({},))
    examples = []
    for number, options in enumerate(variants):
        indices = range(first + number, first + count, len(variants))
        for pair in task_pairs(WORLD_TASKS[task], config.seed, indices, size, **options):
            examples.append(example_of_pair(task, pair))
    return examples


def example_of_pair(task: str, pair: PairPicture) -> Example:
    """A sample of the world; the wanted picture comes first."""
    if task == "multiview":
        pictures = tuple(replace(pair, image=view) for view in pair.views)
        # Without the world's text, which would tell how the camera moves.
        return Example(task, pictures, "", at_distance(pair.cameras))
    given = [pair.source] if pair.references is None else pair.references
    if task == "text2image":
        given = []
    pictures = (pair, *(replace(pair, image=image) for image in given))
    return Example(task, pictures, pair.text)


def examples_of_folder(pipeline: Pipeline, config: PhotoSettings) -> list[Example]:
    """The samples of config.data: a folder for each task, matched by the pictures' names."""
    root = Path(config.data)
    if not root.is_dir():
        raise ParameterError("data", f"{root}: no such folder")
    examples = []
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or is_hidden(folder):
            continue
        if folder.name == "multiview":
            examples += examples_of_scenes(folder, pipeline, config)
        else:
            examples += examples_of_photos(folder, pipeline, config)
    if not examples:
        raise InputError(f"{root} has no folder of a task, such as {root / 'depth2image'}")
    return examples


def examples_of_photos(
        folder: Path, pipeline: Pipeline, config: PhotoSettings) -> list[Example]:
    """The samples of a task's folder. InputError where it lacks target/ or source/."""
    if not (folder / "target").is_dir():
        raise InputError(
            f"{folder} has no target/; put a task's wanted pictures there, and what is given into "
            "source/")
    photos = read_photos(pipeline, config, str(folder / "target"))
    examples = []
    for photo, given in zip(photos, read_sources(folder, photos)):
        if not given and folder.name != "text2image":
            raise InputError(f"{folder} has no source/; only the task text2image needs none")
        example = Example(folder.name, (photo, *given), photo.text)
        examples += [example] * photo.repeats
    return examples


def examples_of_scenes(folder: Path, pipeline: Pipeline, config: PhotoSettings) -> list[Example]:
    """For each view of each scene with a transforms.json one sample, with one or two others."""
    examples = []
    for scene in read_scenes(folder, config.resolution or pipeline.size[0]):
        try:
            cameras = at_distance(scene.cameras)
        except ParameterError:
            raise InputError(f"{scene.file}: its cameras look at no common point") from None
        for views in choose_views(scene, config.seed):
            photos = tuple(scene.photos[view] for view in views)
            examples.append(
                Example("multiview", photos, photos[0].text, cameras[views], scene.focal))
    return examples


@torch.no_grad()
def encode_frames(
        pipeline: Pipeline, examples: list[Example],
        workers: int | None = 0) -> list[torch.Tensor]:
    """The frames [F,C,h,w] of each example, in 16 bits: a view is a picture and then its rays."""
    pictures = [picture for example in examples for picture in example.pictures]
    latents = iter(encode_pictures(pipeline.vae, pictures, workers))
    encoded = []
    for example in examples:
        frames = torch.stack([next(latents)[0] for _ in example.pictures])  # their means
        if example.cameras is not None:
            channels, side = frames.shape[1:3]
            rays = frames_of_cameras(example.cameras, example.focal, channels, side)
            frames = torch.stack([frames, rays.half()], dim=1).flatten(0, 1)
        encoded.append(frames)
    return encoded


# Which frames are given ---------------------------------------------------------------------------

def is_map(task: str) -> bool:
    """Whether a task draws pictures from maps, so that it can be done the other way round."""
    return task.endswith("2image") and task != "text2image"


def ways_to_give(task: str, frames: int) -> list[list[bool]]:
    """Which frames are given in drawing, in all the ways that a task is done."""
    if task == "multiview":
        views = frames // 2
        ways = []
        for known in range(1, views + 1):
            ways += [given_views(views, known, True), given_views(views, known, False)]
        return [given for given in ways if not all(given)]
    if frames == 1:
        return []
    ways = [[False] + [True] * (frames - 1)]
    if is_map(task):
        ways.append([True] + [False] * (frames - 1))  # the map from the picture
    return ways


def given_views(views: int, known: int, all_cameras: bool) -> list[bool]:
    """Which frames of views are given: the first `known` pictures, and all rays or the first."""
    given = []
    for view in range(views):
        given += [view < known, view == 0 or all_cameras]
    return given


def names_of_tasks(trained: tuple[str, ...]) -> dict[str, str]:
    """{what can be asked for: the task as it was trained}, such as image2depth: depth2image."""
    names = {}
    for task in trained:
        names[task] = task
        if is_map(task):
            names["image2" + task.removesuffix("2image")] = task
        if task == "multiview":
            names[POSE] = task
    return names


def given_frames(
        name: str, asked: str | None, sources: int, cameras: int, views: int) -> list[bool]:
    """Which frames of a drawing are given. ParameterError for sources that do not fit the task.

    name: the task as it was trained. asked: what it was called, of `names_of_tasks`, or None.
    views: how many, if no cameras are given.
    """
    if cameras and (name != "multiview" or asked == POSE):
        raise ParameterError("camera", "only multiview follows cameras; leave it out")
    if asked == POSE:
        if sources < 2:
            raise ParameterError("source", f"camera_pose needs two pictures or more, not {sources}")
        return given_views(sources, sources, False)
    if name == "multiview":
        views = cameras or views
        if sources >= views:
            raise ParameterError("source", f"{sources} pictures leave no view of {views} to draw")
        return given_views(views, sources, bool(cameras))
    if name == "text2image":
        if sources:
            raise ParameterError("source", "text2image is given no picture; leave it out")
        return [False]
    if is_map(name):
        if sources > 1:
            raise ParameterError("source", f"{name} is given one picture or none, not {sources}")
        from_picture = asked is not None and asked.startswith("image2")
        return [from_picture, not from_picture] if sources else [False, False]
    if not sources:
        raise ParameterError("source", f"{name} needs a picture")
    return [False] + [True] * sources
