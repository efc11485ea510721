//! The public services as one set of routes, with reflection and health.

use crate::access::{ADMINS, PUBLIC, only};
use crate::cluster::ClusterService;
use crate::gate::Gate;
use crate::inference::InferenceService;
use crate::jobs::JobsService;
use crate::keys::KeysService;
use crate::metrics::Metrics;
use crate::models::ModelsService;
use crate::rpc;
use mlxnode_proto::v1::cluster_server::ClusterServer;
use mlxnode_proto::v1::inference_server::InferenceServer;
use mlxnode_proto::v1::jobs_server::JobsServer;
use mlxnode_proto::v1::keys_server::KeysServer;
use mlxnode_proto::v1::models_server::ModelsServer;
use std::sync::Arc;
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;

/// The services that clients may call.
pub struct PublicServices {
    /// `mlxnode.v1.Inference`
    pub inference: InferenceService,
    /// `mlxnode.v1.Models`
    pub models: ModelsService,
    /// `mlxnode.v1.Cluster`
    pub cluster: ClusterService,
    /// `mlxnode.v1.Keys`
    pub keys: KeysService,
    /// `mlxnode.v1.Jobs`
    pub jobs: JobsService,
}

/// The largest request that a client may send: a prompt of two million characters, with room for the rest.
const LARGEST_REQUEST: usize = 16 << 20;

/// Routes for [`mlxnode_cluster::serve`]: the public services, reflection and health, each for the roles that may call them, and for the
/// API keys that calls carry as `gate` has it.
///
/// # Errors
/// When the descriptors compiled into this binary cannot be read, which a test would notice.
pub async fn public_routes(
    services: PublicServices,
    gate: Gate,
    metrics: Arc<Metrics>,
) -> Result<Routes, tonic_reflection::server::Error> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<InferenceServer<InferenceService>>().await;
    health.set_serving::<ModelsServer<ModelsService>>().await;
    health.set_serving::<ClusterServer<ClusterService>>().await;
    health.set_serving::<KeysServer<KeysService>>().await;
    health.set_serving::<JobsServer<JobsService>>().await;
    let inference = InferenceServer::new(services.inference).max_decoding_message_size(LARGEST_REQUEST);
    let routes = Routes::new(InterceptedService::new(inference, only(PUBLIC)))
        .add_service(InterceptedService::new(ModelsServer::new(services.models), only(PUBLIC)))
        .add_service(InterceptedService::new(ClusterServer::new(services.cluster), only(PUBLIC)))
        .add_service(InterceptedService::new(KeysServer::new(services.keys), only(ADMINS)))
        .add_service(InterceptedService::new(JobsServer::new(services.jobs), only(ADMINS)))
        .add_service(InterceptedService::new(health_service, only(PUBLIC)))
        .add_service(InterceptedService::new(reflection().build_v1()?, only(PUBLIC)))
        .add_service(InterceptedService::new(reflection().build_v1alpha()?, only(PUBLIC)));
    Ok(rpc::guarded(routes, gate, metrics))
}

/// What reflection tells: the public services only.
fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(mlxnode_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name("mlxnode.v1.Inference")
        .with_service_name("mlxnode.v1.Models")
        .with_service_name("mlxnode.v1.Cluster")
        .with_service_name("mlxnode.v1.Keys")
        .with_service_name("mlxnode.v1.Jobs")
        .with_service_name("grpc.health.v1.Health")
}
