"""Student, teacher and method in one module: the Distiller and its parts."""

from softlabels.distill.distiller import Distiller
from softlabels.distill.output import StepOutput
from softlabels.distill.teacher import Teacher, Teachers
from softlabels.distill.teacher_cache import TeacherCache

__all__ = ["Distiller", "StepOutput", "Teacher", "TeacherCache", "Teachers"]
