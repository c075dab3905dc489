default_scope = "mmaction"
custom_imports = dict(imports=["hvt_backbones.openmmlab", "video.clips"])
custom_hooks = [dict(type="HVTResumeHook")]  # resumes runs that were started with the framework's own backbone too

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
visualizer = dict(type="ActionVisualizer", vis_backends=[dict(type="LocalVisBackend")])
log_processor = dict(by_epoch=True)
log_level = "INFO"
load_from = None
resume = False
